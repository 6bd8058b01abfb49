"""The assistant: tools, and the session in which a model is asked, calls them and answers. Knows no training."""
