"""Does the model draw what it was asked for? GenEval, DPG-Bench, reconstruction scores, and comparisons of models.

Each module stands alone: `geneval`, `dpg`, `reconstruction`, `understanding` score; `generation` makes and finds the
images they score; `judge` answers questions about images; `evaluate` and `compare` are the commands.
"""
