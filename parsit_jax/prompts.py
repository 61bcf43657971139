"""What is asked of a page where the user gave no question."""

READ_PAGE = "Read the page."  # transcriptions are trained on the same words
WHAT_FOLLOWS = "What follows {start}?"  # asked in pre-training only: to find a place by what is printed there
ANALYZE = "Describe the page: what kind of document it is, how it is laid out, and the key information in it."
