"""Choose how to store each weight so that a network of a given size loses least, and write the choice as a plan."""
