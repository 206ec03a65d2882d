"""What people read: the tables of a run and its model card, its page of curves, that page while the run goes on."""
