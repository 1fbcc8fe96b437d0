"""The proof: scores on real text of a model that was made elastic, and of its competitors."""
