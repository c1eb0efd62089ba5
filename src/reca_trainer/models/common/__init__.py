"""What several families compute alike. Nothing in here knows a family."""
