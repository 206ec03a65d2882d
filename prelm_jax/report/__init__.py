"""What people read: the tables of a run and its model card, its page of curves, and that page during training."""
