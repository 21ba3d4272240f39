-- Renew a worker's lease, and say whose lease is over. KEYS: leases, clock; ARGV: worker, lease (ms)
-- Reply: ms until the next lease may be over, so that somebody looks at that moment; workers whose lease is over
--
-- A lease that ended while nobody could renew proves nothing: Redis was away, and its owner may be alive. So leases are
-- only called over when somebody has renewed without a gap for a whole lease, in which every living owner renewed too.
local lease = tonumber(ARGV[2])
local DAY = 86400000
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('ZREM', KEYS[1], '')  -- needs no memory, so that a full Redis lets pass what follows
local clock = redis.call('HMGET', KEYS[2], 'beat', 'since')
local beat, since = tonumber(clock[1] or 0), tonumber(clock[2] or now)
local set_back = beat > now + lease or since > now
if now - beat > lease / 2 or set_back then since = now end
redis.call('HSET', KEYS[2], 'beat', now, 'since', since)
-- After the clock was set back, the lease of a worker that died before seems to last for as long as it was wrong.
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. (now + (set_back and lease or DAY)), '+inf')) do
  redis.call('ZADD', KEYS[1], now + lease, worker)
end
redis.call('ZADD', KEYS[1], now + lease, ARGV[1])
local running = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local soonest = math.max(tonumber(running[2]), since + lease) - now + 1
if now - since < lease then return {soonest, {}} end
return {soonest, redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)}
