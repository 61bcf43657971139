"""Evaluation of text models: log-probabilities of tokens, perplexity, and EleutherAI's harness."""
