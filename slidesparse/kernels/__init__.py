"""What runs in a linear layer: the reference, the backends, and the layer that is made of them."""
