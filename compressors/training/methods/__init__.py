"""Methods: the stages that a user lists, and the parts of each."""
