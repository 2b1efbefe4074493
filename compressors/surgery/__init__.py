"""Surgery: changes of a module's layers that leave its function as it was."""
