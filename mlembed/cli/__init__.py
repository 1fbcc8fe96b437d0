"""The commands: arguments, then one call. Imported when they run, so that help is quick."""
