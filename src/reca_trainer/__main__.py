"""`python -m reca_trainer`, which `accelerate launch -m reca_trainer` runs on several GPUs."""

import sys

from reca_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
