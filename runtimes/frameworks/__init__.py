"""Framework adapters: how each kind of model file becomes something that predicts."""
