"""What the mesh knows: records, the view over them, and the stores that hold them."""
