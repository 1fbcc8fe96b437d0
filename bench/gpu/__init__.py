"""Everything that a GPU has to tell, in calls of a few minutes: python -m bench gpu."""
