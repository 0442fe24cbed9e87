"""What a decode will take, before it runs."""
