"""Starting ranks, and noticing when one of them fails."""
