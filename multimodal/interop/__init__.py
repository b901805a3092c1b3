"""What others have made: open_clip's architectures, names and weights, and how ours translate to them."""
