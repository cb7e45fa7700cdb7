"""Questions: readers, their one row format, and how they become tokens."""
