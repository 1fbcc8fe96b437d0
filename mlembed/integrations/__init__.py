"""Our loss and exits inside the trainers of other libraries, one file for each library."""
