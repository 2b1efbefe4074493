"""The zoo: networks of others, each with every method. ``make zoo`` runs it."""
