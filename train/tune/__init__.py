"""Fine-tuning of adapters: sft, distill and rl."""
