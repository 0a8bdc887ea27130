"""The world of PixArt-tiny, the embedded model: its scenes, its training and its evaluation.

| module | what it does |
|---|---|
| `scenes` | vocabulary, captions and their parsing |
| `render` | a scene → an image |
| `oracle` | an image → what it shows, without learning |
| `evaluate` | how well a checkpoint paints held-out captions |
| `presets` | what the quantization presets cost and gain |
"""
