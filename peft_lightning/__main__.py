"""``python -m peft_lightning`` is the same as ``peft-lightning``."""

from peft_lightning.cli.main import main

if __name__ == "__main__":
    main()
