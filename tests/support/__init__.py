"""What several test modules need: one way to look at the table, one account, one set of processes."""
