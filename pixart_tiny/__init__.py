"""The world of PixArt-tiny, the embedded model: its scenes, its training and its evaluation.

| module | what it does |
|---|---|
| `scenes` | vocabulary, captions and their parsing |
| `render` | a scene → an image |
| `oracle` | an image → what it shows and how clean it is, without learning |
| `evaluate` | how well a checkpoint generates held-out captions |
| `solver_study`, `solvers`, `step_caches` | how few evaluations a right image needs |
| `presets` | what the quantization presets cost and gain |
| `models`, `data`, `fit` | what every stage of the training uses |
| `train`, `train_*` | the training, one module per component |
"""
