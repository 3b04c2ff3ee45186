"""The demonstration: real tool-call traffic, known answers, rounds through the gate, and what they changed."""
