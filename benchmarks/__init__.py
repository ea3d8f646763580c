"""Scripts that measure, over peft_lightning.study; records are in results/, tables in RESULTS.md."""
