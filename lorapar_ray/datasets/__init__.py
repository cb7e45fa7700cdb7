"""Questions: readers, the row format, and tokenisation."""
