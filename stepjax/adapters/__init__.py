"""LoRA adapters: trained leaves, PEFT folders, merging."""
