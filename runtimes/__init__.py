"""What holds models in memory and answers with them."""
