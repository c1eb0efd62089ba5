"""Does the model draw what it was asked for? GenEval, DPG-Bench, reconstruction scores, and comparisons of models.

Each module stands alone: `geneval`, `dpg`, `reconstruction`, `understanding` score; `generation` makes and finds the
images they score, by one of the `protocols`; `judge` answers questions about images; `evaluate` and `compare` put them
together as their `arguments` say.
"""
