"""The one legend of tensor-shape letters. Names of tensors in model code end in them: ``q_BTNH``.

=====  =====================================================================
B      sequences in a batch
T      positions of a sequence (queries)
S      positions that are looked at (keys), where they differ from T
D      hidden_size: width of the residual stream
N      num_heads: query heads
K      num_kv_heads: key/value heads
G      query heads per key/value head, N = K · G
H      head_dim: channels of a head
F      intermediate_size: inner width of a channel mixer
V      vocab_size
E      num_experts
M      num_slots of a memory
R      rank of a low-rank map
P      query positions of one block of a block-wise computation
C      length of one chunk
=====  =====================================================================
"""

LETTERS = "BTSDNKGHFVEMRPC"
