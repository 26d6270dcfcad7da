"""GenEval: does an image show the objects, counts, colours and positions that a prompt names?"""
