"""Where model files come from, and the node's disk cache of them."""
