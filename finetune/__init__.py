"""The learning room: it fills with the issues that train adapters from traces."""
