"""Tuning with LoRA, DoRA, VeRA and DVoRA: the paper's §3.1, §4 and §5.4 to 5.6."""
