"""The compressed file: its format, the coders of its streams, and the report on its bytes."""
