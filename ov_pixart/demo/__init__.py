"""The demo: `settings` (what can be asked for), `studio` (how it is generated), `page`, `serve`."""
