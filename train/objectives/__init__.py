"""What fine-tuning minimises: one class an objective, and the table of them."""
