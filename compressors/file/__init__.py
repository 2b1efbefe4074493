"""The compressed file: its format, writer and reader, the coders of its streams, and a report."""
