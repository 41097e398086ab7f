"""What a row of each public data set means: one function a set, a row in, labelled `Example`s out."""
