-- Put messages into their queues and drop results of earlier sends, if the caller's lock still holds.
-- KEYS: lock (string), the results, then the list of each message; ARGV: token of the lock, number of results, then the
--       messages
-- Returns 1; 0 if the lock is another's, or nobody's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
-- The messages first: a full Redis refuses a script's first write, and a key that is no list is an error.
local results = tonumber(ARGV[2])
for i = 3, #ARGV do redis.call('LPUSH', KEYS[results + i - 1], ARGV[i]) end
for i = 2, results + 1 do redis.call('DEL', KEYS[i]) end
return 1
