"""The wire and the messages between our own processes: schemas, codecs, errors, units of work.

Knows shapes and bytes. Does not know torch, ray, HTTP routes or scheduling.
"""
