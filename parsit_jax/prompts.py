"""What is asked of a page where the user gave no question: the same words in training and in use."""

READ_PAGE = "Read the page."
ANALYZE = "Describe the page: what kind of document it is, how it is laid out, and the key information in it."
