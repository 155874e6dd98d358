"""What student and teachers are given to read: messages, contexts, token ids."""
