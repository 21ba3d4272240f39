-- Note below which offset of each partition all is done, and drop bitmaps that nothing needs any more, if the caller's
-- lock still holds.
-- KEYS: lock (string), floors of the topic (hash), then the bitmaps to drop; ARGV: token of the lock, then field and value
-- Returns 1; 0 if the lock is another's, or nobody's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], unpack(ARGV, 2))
for i = 3, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
