-- Which Kafka a cluster's name stands for; the first one that is told is remembered.
-- KEYS: clusters; ARGV: name, id of the Kafka at hand
-- Reply: the id that is remembered
redis.call('HDEL', KEYS[1], '')  -- needs no memory, so that a full Redis lets pass what follows
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
return redis.call('HGET', KEYS[1], ARGV[1])
