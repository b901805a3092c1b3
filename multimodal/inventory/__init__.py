"""What runs there are: `listing` tells how they stand, `where` filters them, `cleaning` deletes checkpoints by rule."""
