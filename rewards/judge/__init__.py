"""A vision-language model on a server as a reward."""
