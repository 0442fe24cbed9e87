"""What a decode keeps so that it can be resumed."""
