"""What attention means here, and how a call finds the backend that computes it."""
